# What follows from a configuration.
{ lib }:

let
  layered = import ./lib.nix { inherit lib; };
  inherit (layered)
    defaultDirectory
    defaultSocketPath
    readLowerStore
    stateDir
    ;

  # A value of an attribute set that may not be one: `settings` is whatever a user has written.
  textOr =
    default: table: key:
    let
      value = table.${key} or null;
    in
    if lib.isString value then value else default;
in
rec {
  # What a store's table means, with every default filled in. Made for tables without mistakes, and
  # total for others, which are refused when the system is built.
  resolve =
    name: table:
    let
      text = textOr null table "lower-store";
    in
    rec {
      inherit name;
      ephemeral = table ? ephemeral-size;
      directory = "${stateDir}/stores/${name}";
      root = textOr (defaultDirectory name "root") table "root";
      upperLayer = textOr (defaultDirectory name "upper") table "upper-layer";
      workDir = textOr (defaultDirectory name "work") table "work-dir";
      realStoreDir = "${root}/nix/store";
      mountUnit = layered.mountUnit realStoreDir;
      lower = if text == null then { } else readLowerStore text;
      socketPath =
        if lib.isAttrs (table.daemon or null) then
          textOr (defaultSocketPath name) table.daemon "socket-path"
        else
          null;
    };

  # All stores of a configuration, by name.
  resolveAll =
    settings:
    lib.mapAttrs resolve (lib.filterAttrs (_name: lib.isAttrs) (settings.stores or { }));

  # The names of a store and of those it lies on, itself first. It ends behind a name that is there
  # already, and at one that no store has.
  chain =
    stores: name:
    let
      follow =
        names: name:
        let
          next = stores.${name}.lower.layered or null;
        in
        if lib.elem name names then
          names ++ [ name ]
        else if !stores ? ${name} || next == null then
          names ++ [ name ]
        else
          follow (names ++ [ name ]) next;
    in
    follow [ ] name;

  # The URL under which Nix opens a store, as `layered-stores uri` prints it (`StoreSpec::uri`).
  uri =
    { remountHook, stores }:
    name:
    let
      store = stores.${name};
      # A configuration that is refused must not become an infinite recursion before it is.
      names = chain stores name;
      usable = lib.allUnique names && lib.all (name: stores ? ${name}) names;
      lowerUrl =
        if store.lower ? layered then
          uri { inherit remountHook stores; } store.lower.layered
        else
          store.lower.url or (throw "the lower store of the layered store ${name} has no URL");
      parameter = key: value: "${key}=${layered.encode value}";
    in
    if usable then
      "local-overlay://?"
      + lib.concatStringsSep "&" [
        (parameter "root" store.root)
        (parameter "lower-store" lowerUrl)
        (parameter "upper-layer" store.upperLayer)
        (parameter "remount-hook" remountHook)
      ]
    else
      throw "the layered store ${name} has no URL: it lies on ${
        lib.concatStringsSep " on " (lib.tail names)
      }";

  # The directories that a store writes, by the options that name them.
  written =
    store:
    if store.ephemeral then
      { "ephemeral.size" = store.directory; }
    else
      { inherit (store) root upperLayer workDir; };

  # The directories that have to be there, filesystems mounted, before a store is brought up.
  directories =
    store:
    lib.optionals (!store.ephemeral) [
      store.root
      store.upperLayer
      store.workDir
    ]
    ++ lib.optional (store.lower ? dir) store.lower.dir;
}
