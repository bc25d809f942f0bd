"""Readers of file formats; each says in one line what is wrong with a file.

What becomes of a file's content is the subject of the modules beside this package.

A file may be damaged, or made to do harm. Whatever is wrong with one ends in a `files.DataError`,
and nothing is allocated on the word of a header alone: sizes are compared with what the file can
hold and with `files.limit`, 512 MiB of unpacked content, before anything of that size is made. Only
regular files are opened, only JPEG and PNG reach Pillow, and unpickling creates numbers and
built-in containers only.
"""
