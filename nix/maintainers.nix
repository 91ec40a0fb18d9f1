# Whom to ask about the package and the module. In Nixpkgs it would be an entry of
# maintainers/maintainer-list.nix, of which these are the fields.
[
  {
    name = "The authors of layered-stores";
    github = "OWNER";
  }
]
