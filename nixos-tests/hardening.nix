# Stores with Nix daemons that do all that Nix daemons do, on a machine with build users.
{
  name = "layered-stores-hardening";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores = {
      sys = {
        lowerStore = "daemon";
        daemon = {
          enable = true;
          allowedUsers = [ "alice" ];
          settings = {
            sandbox = true;
            sandbox-fallback = false;
            require-sigs = false;
            substituters = [ "file:///srv/cache" ];
            builders = "unix:///run/layered-stores/remote/daemon.sock?root=/var/lib/layered-stores/stores/remote/root x86_64-linux,aarch64-linux - 1 1 elsewhere elsewhere";
          };
        };
      };
      remote = {
        lowerStore = "daemon";
        daemon = {
          enable = true;
          allowedUsers = [ "root" ];
          settings.extra-system-features = [ "elsewhere" ];
        };
      };
      hers = {
        lowerStore = "daemon";
        owner = "alice";
        daemon = {
          enable = true;
          allowedUsers = [ "alice" ];
        };
      };
    };
  };

  testScript = builtins.readFile ./hardening.py;
}
