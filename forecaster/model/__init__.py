"""The network and everything that touches TensorFlow: columns in, columns out.

`spec`, `layout`, `columns`, `plan` and `registry` need NumPy only; import them freely.
`step` and `training` bring TensorFlow with them.
"""
