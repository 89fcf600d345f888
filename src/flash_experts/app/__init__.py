"""The playground: names in a browser and over HTTP. Everything but `page` and `server` works without Gradio."""
