# One store on a machine whose bus is dbus-broker.
{
  name = "layered-stores-broker";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.dbus.implementation = "broker";

    services.layeredStores.stores.ci = {
      lowerStore = "/srv/base";
      root = "/srv/ci/root";
      upperLayer = "/srv/ci/upper";
      workDir = "/srv/ci/work";
    };
  };

  testScript = builtins.readFile ./broker.py;
}
