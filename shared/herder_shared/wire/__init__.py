"""The wire: frames, messages, the session as a machine without I/O, and the asyncio shell over it."""
