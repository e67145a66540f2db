"""The WebUI runs this when it starts. The extension needs no package that the WebUI lacks."""
