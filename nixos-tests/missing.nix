# Stores whose filesystems come late, or are taken away.
{
  name = "layered-stores-missing";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores = {
      # Its upper layer is on a filesystem that is not there at boot, its database is not.
      fast = {
        lowerStore = "local";
        root = "/srv/fast/root";
        upperLayer = "/srv/disk/fast/upper";
        workDir = "/srv/disk/fast/work";
        autostart = false;
      };
      # All of it is in the state directory.
      kept.lowerStore = "local";
      scratch = {
        lowerStore = "local";
        ephemeral.enable = true;
        ephemeral.size = "64M";
      };
    };
  };

  testScript = builtins.readFile ./missing.py;
}
