//! What keeps paths, as it is read from a database.

use layered_stores_nix_db::{Database, DatabaseError, Dead, Keep};

use crate::nix::{Nix, name};

#[test]
fn what_keeps_a_path_is_read() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut nix = Nix::opens(dir.path(), "wal");
    nix.registers(1..=4);
    nix.refers(2, 1);
    nix.refers(1, 1);
    let graph = || Database::open(dir.path())?.read(|snapshot| snapshot.graph());
    assert!(matches!(graph(), Err(DatabaseError::Foreign { .. })));
    let (output, drv, gone, elsewhere) = (name(2), name(3), name(8), name(9));
    nix.runs(&format!(
        "create table DerivationOutputs (drv integer not null, id text not null, path text not null, primary key (drv, id)); \
         insert into DerivationOutputs values (3, 'out', '/nix/store/{output}'), (3, 'dev', '/nix/store/{gone}'); \
         update ValidPaths set deriver = '/nix/store/{drv}', registrationTime = 7 where id = 2; \
         update ValidPaths set deriver = '/nix/store/{elsewhere}' where id = 4;"
    ));
    let graph = graph().expect("read");
    let dead = |roots: &[usize], derivations, outputs| {
        let roots = roots.iter().map(|number| name(*number).parse().expect("a name"));
        graph.dead(roots, Keep { derivations, outputs })
    };
    let names = |dead: Vec<Dead>| dead.into_iter().map(|dead| dead.name.to_string()).collect::<Vec<_>>();
    assert_eq!(names(dead(&[2], true, false)), [name(4)]);
    assert_eq!(names(dead(&[2], false, false)), [name(3), name(4)]);
    assert_eq!(names(dead(&[3], false, true)), [name(4)]);
    assert_eq!(names(dead(&[3, 9], true, false)), [name(1), name(2), name(4)]);
    let all = dead(&[], true, true);
    assert_eq!(all.iter().map(|dead| dead.registered).collect::<Vec<_>>(), [1, 7, 1, 1]);
    assert_eq!(all[0].with, [1]);
    let contains = |number| graph.contains(&name(number).parse().expect("a name"));
    assert!(contains(1) && !contains(8));
    nix.ends();
}
