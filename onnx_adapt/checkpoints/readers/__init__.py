"""The files of each training library -> what they ask for. No graph is known here."""
