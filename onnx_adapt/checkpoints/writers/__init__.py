"""Write edits in the files of each training library. A writer imports no graph."""
