"""One session, many adapters: loaded, swapped, blended, one for each row."""
