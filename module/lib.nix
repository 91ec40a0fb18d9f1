# Names, paths and store URLs, read and written as the daemon reads and writes them (src/store/).
#
# A reading that can fail returns { problem = "…"; }: the sentence the daemon would say.
{ lib }:

let
  inherit (builtins)
    elemAt
    filter
    head
    isString
    match
    split
    stringLength
    substring
    ;

  nixStoreDir = "/nix/store";

  # The first character of a text that is outside a set, as the daemon shows it; null if there is
  # none. Nix counts bytes, so what is not ASCII is shown up to where ASCII begins again.
  foreignCharacter =
    set: text:
    let
      runs = filter (part: isString part && part != "") (split "[${set}]+" text);
      run = head runs;
      ascii = match "[ -~].*" run != null;
      character = if ascii then substring 0 1 run else head (split "[ -~]" run);
      escaped = lib.replaceStrings ([ "\\" "'" ] ++ controls) (
        [ "\\\\" "\\'" ] ++ map shown controlCodes
      ) character;
    in
    if runs == [ ] then null else "'${escaped}'";

  # The control characters of ASCII, but for NUL, which no text in Nix can hold.
  controlCodes = lib.range 1 31 ++ [ 127 ];
  controls = map character controlCodes;
  character = code: builtins.fromJSON "\"\\u00${lib.fixedWidthString 2 "0" (hexadecimal code)}\"";
  hexadecimal = code: lib.toLower (lib.toHexString code);
  # As Rust shows them.
  shown =
    code:
    {
      "0" = "\\0";
      "9" = "\\t";
      "10" = "\\n";
      "13" = "\\r";
    }
    .${toString code} or "\\u{${hexadecimal code}}";
  control = "[${character 1}-${character 31}${character 127}]";

  # One character of a percent-encoded text. What is not ASCII is of no use in a path: it becomes
  # something that is refused.
  decoded =
    hex: if match "[0-7].|0[1-9a-fA-F]" hex != null then ascii hex else "�";
  ascii = hex: if hex == "00" then "�" else builtins.fromJSON "\"\\u00${hex}\"";
in
rec {
  # Whether a text would be obeyed by a terminal, or end a line or a string somewhere.
  holdsControl = text: lib.length (split control text) > 1;

  # The first such character of a URL, as it is or percent-encoded, as the daemon shows it; or null.
  controlInUrl =
    url:
    let
      parts = split "(%[01][0-9a-fA-F]|%7[fF]|${control})" url;
      found = head (elemAt parts 1);
      code =
        if stringLength found == 3 then
          (builtins.fromTOML "code = 0x${substring 1 2 found}").code
        else
          lib.head (lib.filter (code: character code == found) controlCodes);
    in
    if lib.length parts == 1 then null else "'${shown code}'";

  # Where the daemon keeps what is given no place of its own.
  stateDir = "/var/lib/layered-stores";

  # The longest path (`AbsolutePath::MAX_LEN`) and the longest name of a unit (`MAX_LEN`).
  maxPathLength = 254;
  maxUnitNameLength = 255;
  maxNameLength = 64;

  # sun_path of unix(7), less its final NUL.
  maxSocketPathLength = 107;

  # Why a text is no store's name; null if it is one.
  nameProblem =
    name:
    let
      foreign = foreignCharacter "a-z0-9-" name;
    in
    if name == "" then
      "a store's name is empty; use lower-case letters, digits and '-'"
    else if stringLength name > maxNameLength then
      "the name is ${toString (stringLength name)} bytes long; the most is ${toString maxNameLength}"
    else if lib.hasPrefix "-" name then
      "the name starts with '-'; start it with a lower-case letter or a digit"
    else if foreign != null then
      "the name holds ${foreign}; use lower-case letters, digits and '-' only"
    else
      null;

  # Why a text is no path for a layered store; null if it is one.
  pathProblem =
    path:
    let
      foreign = foreignCharacter "a-zA-Z0-9/._-" path;
      bad = lib.findFirst (component: lib.elem component [ "" "." ".." ]) null (
        lib.splitString "/" (lib.removePrefix "/" path)
      );
    in
    if path == "" then
      "the path is empty; give an absolute path"
    else if !lib.hasPrefix "/" path then
      "the path is relative; give an absolute path"
    else if path == "/" then
      "the root directory cannot be used here; give a directory of its own"
    else if stringLength path > maxPathLength then
      "the path is ${toString (stringLength path)} bytes long; "
      + "the kernel takes at most ${toString maxPathLength}"
    else if foreign != null then
      "the path holds ${foreign}; "
      + "only letters, digits, '/', '.', '_' and '-' are safe in mount options"
    else if lib.hasSuffix "/" path then
      "the path ends in '/'; leave the last '/' away"
    else if bad != null then
      "the path holds \"${bad}\" as a component; write the path without it"
    else
      null;

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

  # Reads what `lower-store` may be (src/store/lower.rs):
  #   { layered = NAME; }          another store of the configuration
  #   { url, dir, throughDaemon }  a Nix store, its directory, and whether this machine's daemon
  #                                serves it
  #   { problem }
  readLowerStore =
    text:
    let
      name = lib.removePrefix "layered:" text;
      problem = nameProblem name;
    in
    if text == "" then
      {
        problem =
          "it is empty; name a root directory, a Nix store URL such as \"daemon\", "
          + "or \"layered:NAME\"";
      }
    else if lib.hasPrefix "layered:" text then
      if problem == null then
        { layered = name; }
      else
        { problem = "what follows \"layered:\" is no store's name: ${problem}"; }
    else if text == "/" then
      {
        problem =
          "the host's own store is written \"daemon\" (through its daemon) or \"local\" (directly)";
      }
    else
      readUrl text;

  readUrl =
    url:
    let
      parts = splitOnce "?" url;
      base = splitOnce "://" (head parts);
      scheme = head base;
      authority = elemAt base 1;
      parameters = lib.foldl' readParameter { } (lib.splitString "&" (elemAt parts 1));
      readParameter =
        found: pair:
        let
          key = head (splitOnce "=" pair);
          value = decode (elemAt (splitOnce "=" pair) 1);
        in
        if !lib.hasInfix "=" pair then
          found
        else if key == "root" && value == "" then
          found
        else if key == "store" then
          if value == nixStoreDir || found ? store then found else found // { store = value; }
        else if lib.elem key [ "root" "real" ] then
          found // { ${key} = value; }
        else
          found;
      root =
        parameters.root or (
          if lib.hasPrefix "/" scheme then
            scheme
          else if scheme == "local" && authority != "" then
            authority
          else
            null
        );
      dir =
        if parameters ? real then
          parameters.real
        else if root == null then
          nixStoreDir
        else
          "${root}/nix/store";
      problem = pathProblem (if parameters ? real || root == null then dir else root);
      tooLong = pathProblem dir;
    in
    if lib.elem scheme [ "auto" "daemon" "unix" "local-overlay" "local" ] || lib.hasPrefix "/" scheme
    then
      if parameters ? store then
        {
          problem =
            "its store directory is ${builtins.toJSON parameters.store}; "
            + "a layered store needs one that is \"${nixStoreDir}\"";
        }
      else if problem != null then
        { inherit problem; }
      else if tooLong != null then
        { problem = tooLong; }
      else if controlInUrl url != null then
        {
          problem =
            "it holds ${controlInUrl url}, as it is or percent-encoded, which no store's URL has to; "
            + "take it away";
        }
      else
        {
          inherit url dir;
          throughDaemon =
            lib.elem scheme [ "auto" "daemon" ] || (scheme == "unix" && authority == "");
        }
    else if lib.hasInfix "/" scheme then
      { problem = "the path is relative; give an absolute path"; }
    else
      {
        problem =
          "a ${builtins.toJSON scheme} store has no directory on this machine; an overlay needs one: "
          + "use a root directory, \"daemon\", \"local\" or \"layered:NAME\"";
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
