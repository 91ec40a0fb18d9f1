# A system whose units and configuration a machine without NixOS is booted with: everything that can
# be declared is in it.
{ lib, evaluate }:

let
  evaluated = evaluate [
    {
      services.layeredStores = {
        enable = true;
        metrics.enable = true;
        metrics.textfile = "/var/lib/figures/layered-stores.prom";
        stores = {
          ci = {
            lowerStore = "local";
            root = "/srv/ci/root";
            upperLayer = "/srv/ci/upper";
            workDir = "/srv/ci/work";
            mountOptions = [ "noatime" ];
            remountUsers = [ "alice" ];
            daemon = {
              enable = true;
              allowedUsers = [ "alice" ];
              serviceConfig.MemoryMax = "1G";
            };
          };
          data = {
            lowerStore = "local";
            root = "/data/root";
            upperLayer = "/data/upper";
            workDir = "/data/work";
          };
          plain = {
            lowerStore = "local";
            gc = {
              automatic = true;
              dates = [
                "Mon 04:00"
                "Thu 05:00"
              ];
              options = "--until-free 1M --older-than 30d";
              persistent = false;
              randomizedDelaySec = "45min";
            };
          };
          top.lowerStore = "layered:plain";
          scratch = {
            lowerStore = "local";
            ephemeral.enable = true;
            ephemeral.size = "64M";
          };
        };
      };
      users.users.alice.isNormalUser = true;
    }
  ];
in
assert evaluated.failures == [ ] && evaluated.warnings == [ ];
evaluated
// {
  polkit = lib.concatStrings evaluated.said.extraConfig;
  uris = lib.mapAttrs (_name: store: store.uri) evaluated.config.services.layeredStores.stores;
}
