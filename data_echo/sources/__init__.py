"""Where are raw examples read from? Random access to arrays, files, folders and archives."""
