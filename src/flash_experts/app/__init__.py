"""The playground: name generation in a browser and over HTTP, with Gradio."""
