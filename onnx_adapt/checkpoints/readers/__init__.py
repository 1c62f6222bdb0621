"""Read the files of each training library as edits. A reader imports no graph."""
