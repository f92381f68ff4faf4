"""How setup.py builds: `plan` says what is built from what with which flags; `ninja_file` does."""
