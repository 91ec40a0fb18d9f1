# Stores over one lower store whose garbage is collected again and again.
{
  name = "layered-stores-leases";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores = {
      ci = {
        lowerStore = "/srv/base";
        root = "/srv/ci/root";
        upperLayer = "/srv/ci/upper";
        workDir = "/srv/ci/work";
      };
      own = {
        lowerStore = "/srv/base?read-only=true";
        root = "/srv/own/root";
        upperLayer = "/srv/own/upper";
        workDir = "/srv/own/work";
        owner = "alice";
      };
      over = {
        lowerStore = "layered:ci";
        root = "/srv/over/root";
        upperLayer = "/srv/over/upper";
        workDir = "/srv/over/work";
      };
    };
  };

  testScript = builtins.readFile ./leases.py;
}
