"""The package fasfx.tools."""

if __name__ != "fasfx.tools":
    raise ImportError("import fasfx.tools, not tools")
