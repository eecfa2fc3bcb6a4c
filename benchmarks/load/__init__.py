"""Many processes and threads that write and read encrypted values while data keys come and go, and what is wrong then.

Nothing here is a matter of speed: a run finds that all values are right, or says which are not.
"""
