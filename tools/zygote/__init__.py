"""A process that imports SGLang once and forks: a server then starts in seconds, as it imports almost nothing.

For tests on a machine without a GPU. A forked process is in the state of a Python that has imported torch, SGLang's
model classes and their libraries, and nothing else: plug-ins are loaded by each process of the server, as after an
ordinary start, and so are the modules of SGLang that read a test's environment when they are imported.

- `client`: start a process, forked where a zygote listens, with a new interpreter elsewhere.
- `interpreter`: a forked process becomes what was ordered; those that it starts in turn are forks as well.
- `__main__`: the zygote.
"""
