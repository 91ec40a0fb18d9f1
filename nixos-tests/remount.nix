# Two stores of different owners on one lower store, and one on this machine's own store.
{
  name = "layered-stores-remount";

  nodes.machine = {
    imports = [ ./machine.nix ];

    # Their lower store is filled by the scenario, so nothing is there at boot.
    services.layeredStores.stores = {
      ci = {
        lowerStore = "/srv/lower";
        root = "/srv/ci/root";
        upperLayer = "/srv/ci/upper";
        workDir = "/srv/ci/work";
        required = false;
      };
      hers = {
        lowerStore = "/srv/lower?read-only=true";
        root = "/srv/hers/root";
        upperLayer = "/srv/hers/upper";
        workDir = "/srv/hers/work";
        owner = "alice";
        required = false;
      };
      host.lowerStore = "local";
    };
  };

  testScript = builtins.readFile ./remount.py;
}
