"""A server that speaks the OpenAI chat-completions API, for concurrent requests over HTTP."""
