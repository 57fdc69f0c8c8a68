"""Where do raw examples lie? Random access to arrays, files, folders and archives."""
