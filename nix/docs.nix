# The manual as a book, which `make docs` makes elsewhere.
{ mdbook, runCommand }:

runCommand "layered-stores-docs" { nativeBuildInputs = [ mdbook ]; } ''
  mdbook build --dest-dir "$out" ${../docs}
''
