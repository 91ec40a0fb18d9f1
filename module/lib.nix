# Paths, unit names and store URLs, read and written as the daemon does (crates/model/src/).
#
# Whether they are right is not said here: what is wrong is read as something or other, and refused
# by `layered-stores check-config` while the system is built.
{ lib }:

let
  inherit (builtins)
    elemAt
    head
    isString
    match
    split
    ;

  nixStoreDir = "/nix/store";

  # One character of a percent-encoded text. What is not ASCII has no place in a path, and becomes
  # something that is refused.
  decoded =
    hex:
    if match "[1-7].|0[1-9a-fA-F]" hex != null then builtins.fromJSON "\"\\u00${hex}\"" else "�";
in
rec {
  # Where the daemon keeps what is given no place of its own.
  stateDir = "/var/lib/layered-stores";
  defaultDirectory = name: tail: "${stateDir}/stores/${name}/${tail}";
  defaultSocketPath = name: "/run/layered-stores/${name}/daemon.sock";

  # A path and all directories above it, the path first, without the root directory.
  ancestors =
    path:
    let
      components = lib.splitString "/" (lib.removePrefix "/" path);
      upTo = count: "/" + lib.concatStringsSep "/" (lib.take count components);
    in
    map upTo (lib.reverseList (lib.range 1 (lib.length components)));

  # What `systemd-escape --path` makes of an absolute path (systemd.unit(5)).
  escapePath =
    path:
    let
      tail = lib.removePrefix "/" path;
      escape = lib.strings.escapeC (lib.stringToCharacters " !\"#$%&'()*+,;<=>?@[\\]^`{|}~-");
      escaped = lib.replaceStrings [ "/" ] [ "-" ] (escape tail);
    in
    if lib.hasPrefix "." escaped then "\\x2e" + lib.removePrefix "." escaped else escaped;

  mountUnit = path: "${escapePath path}.mount";

  # A parameter of a Nix store URL: everything but RFC 3986's unreserved characters and the slash is
  # escaped.
  encode = text: lib.replaceStrings [ "%2F" ] [ "/" ] (lib.strings.escapeURL text);

  # The opposite. A '%' without two digits behind it stays as it is.
  decode =
    text:
    lib.concatMapStrings (part: if isString part then part else decoded (head part)) (
      split "%([0-9a-fA-F]{2})" text
    );

  # Reads what `lower-store` may be:
  #   { layered = NAME; }          another store of the configuration
  #   { url, dir, throughDaemon }  a Nix store, its directory, and whether this machine's daemon
  #                                serves it
  readLowerStore =
    text:
    if lib.hasPrefix "layered:" text then
      { layered = lib.removePrefix "layered:" text; }
    else
      readUrl text;

  readUrl =
    url:
    let
      parts = splitOnce "?" url;
      base = splitOnce "://" (head parts);
      scheme = head base;
      authority = elemAt base 1;
      pairs = lib.filter (lib.hasInfix "=") (lib.splitString "&" (elemAt parts 1));
      # The last of those with the same name counts.
      parameters = lib.listToAttrs (lib.reverseList (map readParameter pairs));
      readParameter =
        pair:
        let
          parameter = splitOnce "=" pair;
        in
        lib.nameValuePair (head parameter) (decode (elemAt parameter 1));
      root =
        if parameters.root or "" != "" then
          parameters.root
        else if lib.hasPrefix "/" scheme then
          scheme
        else
          lib.optionalString (scheme == "local") authority;
    in
    {
      inherit url;
      dir = parameters.real or "${root}${nixStoreDir}";
      throughDaemon =
        lib.elem scheme [ "auto" "daemon" ] || (scheme == "unix" && authority == "");
    };

  # A text before and behind a separator; behind is "" where there is none.
  splitOnce =
    separator: text:
    let
      parts = lib.splitString separator text;
    in
    [
      (head parts)
      (lib.concatStringsSep separator (lib.drop 1 parts))
    ];
}
