"""OpenAI's API in words alone: bodies read into what an engine is asked, answers and errors in their shapes.

Online and batch both come through here, so that a body means the same by either way. It knows no HTTP server.
"""
