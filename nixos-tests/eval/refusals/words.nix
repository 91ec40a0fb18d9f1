# What the cases are written with.
{
  lib,
  layered,
}:

rec {
  refusal =
    where: what: configuration:
    {
      inherit configuration;
      types = [ ];
      assertions = [ ];
      build = [ ];
    }
    // {
      ${where} = what;
    };
  atBuild = lib.flip (refusal "build");
  asserted = lib.flip (refusal "assertions");
  stores = stores: layered { inherit stores; };

  # A store that is sound but for what is given.
  ci = more: stores { ci = { lowerStore = "/l"; } // more; };
  served =
    more:
    ci {
      daemon = {
        enable = true;
        allowedGroups = [ "users" ];
      }
      // more;
    };
  typed = option: more: refusal "types" [ (optionOf "ci" option) ] (ci more);

  optionOf = name: option: "services.layeredStores.stores.${name}.${option}";
  # What the daemon says about a key: `store "ci": mode (services.….mode) = "rwx": …`.
  said =
    name: key: sentence:
    "store \"${name}\": ${key} (${
      lib.concatMapStringsSep " or " (optionOf name) (lib.toList options.${key} or key)
    })${sentence}";
  options = {
    lower-store = "lowerStore";
    upper-layer = "upperLayer";
    work-dir = "workDir";
    mount-options = "mountOptions";
    ephemeral-size = "ephemeral.size";
    "daemon.socket-path" = "daemon.socketPath";
    "daemon.socket-mode" = "daemon.socketMode";
    "daemon.allowed-users" = [
      "daemon.allowedUsers"
      "daemon.allowedGroups"
    ];
    "daemon.trusted-users" = "daemon.trustedUsers";
    "daemon.settings.max jobs" = "daemon.settings.\"max jobs\"";
  };
  value = key: value: sentence: said "ci" key " = ${quoted value}: ${sentence}";
  missing =
    "store \"ci\": key \"lower-store\" (${optionOf "ci" "lowerStore"}) is missing; name the store "
    + "underneath, for example \"daemon\"";
  quoted = builtins.toJSON;
  repeat = count: text: lib.concatStrings (lib.genList (_index: text) count);
  escape = builtins.fromJSON "\"\\u001b\"";

  characters = "only letters, digits, '/', '.', '_' and '-' are safe in mount options";
  noDirectory =
    scheme:
    "a \"${scheme}\" store has no directory on this machine; an overlay needs one: use a root "
    + "directory, \"daemon\", \"local\" or \"layered:NAME\"";
  modeForm = "a mode is three or four octal digits that leave the owner all rights, such as \"1775\"";
  everybody = "everybody could write into the store; take the last digit's 2 away";
}
