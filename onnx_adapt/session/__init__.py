"""One session with many adapters: loaded, swapped, blended, or one for each row."""
