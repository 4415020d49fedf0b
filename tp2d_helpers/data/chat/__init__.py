"""A conversation → its text by a chat template, and where in that text each message stands.

`template` renders, `answers` finds what the assistant wrote, `written` finds what the template left out, and `places`
turns characters into tokens.
"""
