"""The operator graph through TVM: import, our own operators, layout, schedules, LLVM. Only processes that compile load it."""
