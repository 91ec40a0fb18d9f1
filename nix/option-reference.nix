# A reference of the module's options in Markdown. It needs the Nixpkgs library and nothing else.
{
  lib,
  options,
  prefix ? "services.layeredStores",
}:

let
  documented = lib.filter (
    option: option.visible && !option.internal && lib.hasPrefix prefix option.name
  ) (lib.optionAttrSetToDocList options);

  # A value as it is written in Nix, or as its author has put it.
  value =
    of:
    let
      text = of.text or (lib.generators.toPretty { } of);
    in
    if (of._type or "") == "literalMD" then
      " ${text}"
    else if lib.hasInfix "\n" text then
      "\n\n```nix\n${text}\n```"
    else
      " `${text}`";

  # The roles of NixOS' documentation, without what only its renderer knows.
  roles =
    text:
    lib.concatStrings (
      map (part: if lib.isString part then part else "`${lib.last part}`") (
        builtins.split "[{](option|manpage|command|env|file)[}]`([^`]+)`" text
      )
    );

  entry =
    option:
    lib.concatStringsSep "\n\n" (
      [
        "## `${option.name}`"
        (roles (lib.removeSuffix "\n" (option.description.text or option.description)))
        "*Type:* ${option.type}"
      ]
      ++ lib.optional (option ? default) "*Default:*${roles (value option.default)}"
      ++ lib.optional (option ? example) "*Example:*${value option.example}"
      ++ lib.optional option.readOnly "*Read-only.*"
    );
in
''
  # Options

  What `services.layeredStores` takes on NixOS. This page is made from the options themselves.

''
+ lib.concatMapStringsSep "\n\n" entry documented
+ "\n"
