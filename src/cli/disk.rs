//! How much room files take on disk.
//!
//! What is counted may belong to somebody else. So it is walked by descriptors, through which no link and no mount is followed.

use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat},
    io::Errno,
};

/// How a directory is opened that may be anybody's.
pub(super) const FLAGS: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

/// How deep directories are followed, each with an open descriptor.
pub(super) const DEPTH: usize = 512;

/// Visits all that is below a directory. Files come and go meanwhile, and whoever owns them may put links in their place.
pub(super) fn each_below(top: OwnedFd, mut visit: impl FnMut(&Stat)) -> io::Result<()> {
    let mut open = vec![Dir::new(top)?];
    while let Some(directory) = open.last_mut() {
        let Some(entry) = directory.next() else {
            open.pop();
            continue;
        };
        let entry = entry?;
        if matches!(entry.file_name().to_bytes(), b"." | b"..") {
            continue;
        }
        let at = directory.fd()?;
        let Ok(stat) = rustix::fs::statat(at, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) else { continue };
        visit(&stat);
        let below = if is_directory(&stat) { open_below(at, entry.file_name()).ok() } else { None };
        if let Some(below) = below
            && open.len() < DEPTH
        {
            open.push(Dir::new(below)?);
        }
    }
    Ok(())
}

/// How many bytes something takes itself.
pub(super) fn bytes_of(stat: &Stat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or(0) * 512
}

pub(super) fn is_directory(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

fn open_below(at: BorrowedFd<'_>, name: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(at, name, FLAGS, Mode::empty(), within)
}

/// What objects in a directory take, by their places in a list: files that several of them have are freed with the last.
#[derive(Debug, Default)]
pub(super) struct Sizes {
    own: Vec<u64>,
    shared: HashMap<(u64, u64), Shared>,
}

/// A file with several names.
#[derive(Debug)]
struct Shared {
    bytes: u64,
    names: u64,
    /// The objects that have it, once for each name.
    holders: Vec<usize>,
}

impl Sizes {
    /// Measures objects in a directory. What is not there takes nothing.
    ///
    /// # Errors
    /// The kernel's, where something is there and cannot be looked at.
    pub(super) fn measure<'n>(directory: &OwnedFd, names: impl IntoIterator<Item = &'n str>) -> io::Result<Self> {
        let mut sizes = Self::default();
        for (place, name) in names.into_iter().enumerate() {
            sizes.own.push(0);
            let stat = match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(error.into()),
            };
            sizes.add(place, &stat);
            if is_directory(&stat) {
                match open_below(directory.as_fd(), name) {
                    Ok(below) => each_below(below, |stat| sizes.add(place, stat))?,
                    Err(Errno::NOENT) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(sizes)
    }

    fn add(&mut self, place: usize, stat: &Stat) {
        if is_directory(stat) || stat.st_nlink == 1 {
            self.own[place] += bytes_of(stat);
            return;
        }
        let shared = || Shared { bytes: bytes_of(stat), names: stat.st_nlink, holders: Vec::new() };
        self.shared.entry((stat.st_dev, stat.st_ino)).or_insert_with(shared).holders.push(place);
    }

    /// What is freed when some of the objects go. `elsewhere` are files that have one more name, which goes as well.
    pub(super) fn freed(&self, is_gone: impl Fn(usize) -> bool, elsewhere: &HashSet<u64>) -> u64 {
        let own = self.own.iter().enumerate().filter(|(place, _)| is_gone(*place)).map(|(_, bytes)| bytes);
        let shared = self.shared.iter().filter(|((_, inode), shared)| {
            let names = shared.holders.len() as u64 + u64::from(elsewhere.contains(inode));
            names >= shared.names && shared.holders.iter().all(|place| is_gone(*place))
        });
        own.sum::<u64>() + shared.map(|(_, shared)| shared.bytes).sum::<u64>()
    }

    /// What each object takes; what several have counts for the first of them.
    pub(super) fn each(&self) -> Vec<u64> {
        let mut each = self.own.clone();
        for shared in self.shared.values() {
            if let Some(first) = shared.holders.iter().min() {
                each[*first] += shared.bytes;
            }
        }
        each
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_file_that_several_have_is_freed_with_the_last() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        for name in ["a", "b", ".links"] {
            fs::create_dir(path(name)).expect("made");
        }
        fs::write(path("a/own"), vec![1; 100_000]).expect("written");
        fs::write(path("a/both"), vec![2; 200_000]).expect("written");
        fs::hard_link(path("a/both"), path("b/both")).expect("linked");
        fs::hard_link(path("a/both"), path(".links/both")).expect("linked");
        fs::write(path("c"), vec![3; 50_000]).expect("written");
        let opened = rustix::fs::open(dir.path(), FLAGS, Mode::empty()).expect("opened");
        let sizes = Sizes::measure(&opened, ["a", "b", "c", "missing"]).expect("measured");
        let inode = rustix::fs::stat(path("a/both")).expect("looked at").st_ino;
        let (none, links) = (HashSet::new(), HashSet::from([inode]));
        let bytes = |name: &str| bytes_of(&rustix::fs::stat(path(name)).expect("looked at"));
        let (a, b, both) = (bytes("a") + bytes("a/own"), bytes("b"), bytes("a/both"));
        assert_eq!(sizes.freed(|place| place == 0, &links), a);
        assert_eq!(sizes.freed(|place| place < 2, &none), a + b, "it has one more name");
        assert_eq!(sizes.freed(|place| place < 2, &links), a + b + both);
        assert_eq!(sizes.freed(|place| place > 1, &links), bytes("c"));
        assert_eq!(sizes.each(), [a + both, b, bytes("c"), 0]);
    }
}
