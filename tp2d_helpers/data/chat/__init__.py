"""A conversation → its text by a chat template, and where in that text each message stands.

`template` renders, by `marks` that say of which message it writes; `forms` finds how it wants to be told things;
`answers` finds what the assistant wrote, `written` what the template left out; `ends` finds the token that ends an
answer.
"""
