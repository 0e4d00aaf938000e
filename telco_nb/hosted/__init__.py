"""Models behind an API: requests, attempts on disk, prices and budget. Imports study alone."""
