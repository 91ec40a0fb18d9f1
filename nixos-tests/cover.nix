# A store, over whose directories others mount, and one that lies on it.
{
  name = "layered-stores-cover";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores = {
      above = {
        lowerStore = "layered:ci";
        root = "/srv/above/root";
        upperLayer = "/srv/above/upper";
        workDir = "/srv/above/work";
        autostart = false;
      };
      ci = {
        lowerStore = "/srv/base";
        root = "/srv/ci/root";
        upperLayer = "/srv/disk/ci/upper";
        workDir = "/srv/disk/ci/work";
      };
    };
  };

  testScript = builtins.readFile ./cover.py;
}
