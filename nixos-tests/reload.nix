# The store that is there from the beginning. The script writes further configurations itself.
{
  name = "layered-stores-reload";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores.kept = {
      lowerStore = "local";
      root = "/srv/kept/root";
      upperLayer = "/srv/kept/upper";
      workDir = "/srv/kept/work";
    };
  };

  testScript = builtins.readFile ./reload.py;
}
