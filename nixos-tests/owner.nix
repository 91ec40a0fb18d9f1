# Stores with Nix daemons: one belongs to a user, the other two, one on the other, to root.
{
  name = "layered-stores-owner";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores = {
      own = {
        lowerStore = "daemon";
        owner = "alice";
        daemon = {
          enable = true;
          allowedUsers = [
            "alice"
            "bob"
          ];
          settings.max-jobs = 2;
        };
      };
      sys = {
        lowerStore = "daemon";
        daemon = {
          enable = true;
          allowedUsers = [ "alice" ];
        };
      };
      top = {
        lowerStore = "layered:sys";
        daemon = {
          enable = true;
          allowedUsers = [ "alice" ];
        };
      };
    };
  };

  testScript = builtins.readFile ./owner.py;
}
