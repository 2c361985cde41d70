"""The page one looks at models, data and runs with: `polyground demo` and `polyground browse`, served on this machine alone.

What it draws and how it finds rows knows nothing of gradio; only `page` and `server` do.
"""
