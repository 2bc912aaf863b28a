"""An evaluator of Core ML programs for machines without Core ML: it verifies what is shipped and runs nothing fast.

It loads a saved ``.mlpackage``, decodes its weights and executes its MIL program operator by operator with torch on the
CPU. It is no runtime for users: on macOS and iOS, Core ML itself executes these files.
"""
