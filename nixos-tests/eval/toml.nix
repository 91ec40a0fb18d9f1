# TOML, of which JSON's strings, numbers and arrays are a part. Nixpkgs has it written by a program,
# while a system is built; here nothing is built.
{ lib }:

let
  key = name: if builtins.match "[A-Za-z0-9_-]+" name != null then name else builtins.toJSON name;
  inline =
    value:
    if lib.isAttrs value then
      "{ ${
        lib.concatStringsSep ", " (lib.mapAttrsToList (name: v: "${key name} = ${inline v}") value)
      } }"
    else if lib.isList value then
      "[ ${lib.concatMapStringsSep ", " inline value} ]"
    else
      builtins.toJSON value;
  table =
    path: value:
    let
      tables = lib.filterAttrs (_name: lib.isAttrs) value;
      others = lib.filterAttrs (_name: v: !lib.isAttrs v) value;
    in
    lib.optionalString (path != [ ]) "[${lib.concatMapStringsSep "." key path}]\n"
    + lib.concatStrings (lib.mapAttrsToList (name: v: "${key name} = ${inline v}\n") others)
    + lib.concatStrings (lib.mapAttrsToList (name: table (path ++ [ name ])) tables);
in
table [ ]
