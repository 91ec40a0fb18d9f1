final: _previous: {
  layered-stores = final.callPackage ./package.nix { };
}
