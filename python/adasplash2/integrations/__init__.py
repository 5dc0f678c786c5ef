"""Other libraries' attention, replaced; each module imports its library when it is used."""
