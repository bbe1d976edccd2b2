"""What is behind the page of `app.py`: the queue for one device, the library, drawing and training for a browser."""
