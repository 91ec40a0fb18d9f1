//! Taking turns with a store's garbage collector, by the lock and the socket that Nix itself uses for that
//! (src/libstore/gc.cc).
//!
//! A collector holds `gc.lock` in the state directory alone. Others, who only add roots, hold it together for a moment each. While
//! there is a collector, they send what is not to be collected to its socket instead, and wait until it has taken note.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    sync::OnceLock,
};

use rustix::{
    fs::{AtFlags, FileType, FlockOperation, Mode, OFlags},
    io::Errno,
};

use crate::roots::{give, nix_directory};

/// The socket of a collector, below the state directory.
const SOCKET_DIR: &str = "gc-socket";
const SOCKET: &str = "socket";

/// The lock of a store's collector.
#[derive(Debug)]
pub struct GcLock {
    fd: OwnedFd,
    /// How the kernel's table of locks calls the file: the device is not what stat(2) says on every filesystem. Known once it was
    /// held.
    file: OnceLock<String>,
}

impl GcLock {
    /// Opens it, and makes it if need be.
    ///
    /// # Errors
    /// What the kernel says; [`Errno::INVAL`] for something that is no file.
    pub fn open(state_dir: impl AsFd) -> Result<Self, Errno> {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let open = |flags, mode| rustix::fs::openat(&state_dir, "gc.lock", flags, mode);
        // For reading: a lock does not ask for more, and one on a filesystem for reading is had as well.
        let fd = match open(flags | OFlags::RDONLY, Mode::empty()) {
            Err(Errno::NOENT) => {
                match open(flags | OFlags::RDONLY | OFlags::CREATE | OFlags::EXCL, Mode::RUSR | Mode::WUSR) {
                    Err(Errno::EXIST) => open(flags | OFlags::RDONLY, Mode::empty())?,
                    made => {
                        let made = made?;
                        give(&made, state_dir.as_fd())?;
                        made
                    }
                }
            }
            fd => fd?,
        };
        let stat = rustix::fs::fstat(&fd)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Errno::INVAL);
        }
        Ok(Self { fd, file: OnceLock::new() })
    }

    /// Takes it together with others. Whether that could be had at once: if not, there is a collector.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn try_share(&self) -> Result<bool, Errno> {
        self.lock(FlockOperation::NonBlockingLockShared)
    }

    /// The same, and waits for the collector to end.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn share(&self) -> Result<(), Errno> {
        loop {
            match rustix::fs::flock(&self.fd, FlockOperation::LockShared) {
                Err(Errno::INTR) => {}
                result => {
                    self.learn();
                    return result;
                }
            }
        }
    }

    /// Takes it alone, as a collector does. Whether that could be had at once.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn try_take(&self) -> Result<bool, Errno> {
        self.lock(FlockOperation::NonBlockingLockExclusive)
    }

    /// Lets go of it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn release(&self) -> Result<(), Errno> {
        rustix::fs::flock(&self.fd, FlockOperation::Unlock)
    }

    fn lock(&self, how: FlockOperation) -> Result<bool, Errno> {
        match rustix::fs::flock(&self.fd, how) {
            Ok(()) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    /// How it is held and waited for, by the kernel's table of locks (`/proc/locks`).
    ///
    /// # Errors
    /// When that cannot be read.
    pub fn holders(&self) -> io::Result<Holders> {
        let Some(file) = self.file.get() else { return Ok(Holders::default()) };
        Ok(Holders::of(&std::fs::read_to_string("/proc/locks")?, file))
    }

    /// Finds out how the table calls the file, by what the kernel says of the lock that this holds (proc_pid_fdinfo(5)).
    fn learn(&self) {
        if self.file.get().is_some() {
            return;
        }
        let path = format!("/proc/thread-self/fdinfo/{}", self.fd.as_raw_fd());
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let lock = text.lines().find_map(|line| line.strip_prefix("lock:"));
        if let Some(file) = lock.and_then(|lock| lock.split_ascii_whitespace().nth(5)) {
            let _ = self.file.set(file.to_owned());
        }
    }

    /// The file, to be watched.
    pub fn as_path(&self) -> PathBuf {
        through(self.fd.as_fd())
    }
}

/// Who holds a lock, and who waits for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holders {
    /// Somebody has it alone.
    pub alone: bool,
    /// Somebody waits to have it alone.
    pub waiting: bool,
}

impl Holders {
    fn of(table: &str, wanted: &str) -> Self {
        let mut holders = Self::default();
        for line in table.lines() {
            let mut words = line.split_ascii_whitespace().skip(1).peekable();
            let waits = words.next_if_eq(&"->").is_some();
            let (Some("FLOCK"), Some(_), Some("WRITE"), Some(_), Some(file)) =
                (words.next(), words.next(), words.next(), words.next(), words.next())
            else {
                continue;
            };
            if file == wanted {
                holders.alone |= !waits;
                holders.waiting |= waits;
            }
        }
        holders
    }
}

/// Connects to the collector that holds a store's lock. It opens its socket a moment after it has the lock.
///
/// # Errors
/// What the kernel says.
pub fn connect(state_dir: BorrowedFd<'_>) -> io::Result<UnixStream> {
    let dir = socket_dir(state_dir)?;
    UnixStream::connect(through(dir.as_fd()).join(SOCKET))
}

/// Listens in the place of a collector. For whoever holds the lock alone: what is there is left from an earlier one.
///
/// The socket is for everybody, as Nix has it, which takes a umask of the calling thread's own: it is set for the moment.
///
/// # Errors
/// What the kernel says.
pub fn listen(state_dir: BorrowedFd<'_>) -> io::Result<Listening> {
    let dir = nix_directory(state_dir, SOCKET_DIR)?;
    remove_socket(dir.as_fd())?;
    let umask = rustix::process::umask(Mode::empty());
    let listener = UnixListener::bind(through(dir.as_fd()).join(SOCKET));
    rustix::process::umask(umask);
    Ok(Listening { listener: listener?, dir })
}

/// A socket in the place of a collector's.
#[derive(Debug)]
pub struct Listening {
    /// It.
    pub listener: UnixListener,
    dir: OwnedFd,
}

impl Listening {
    /// Takes the socket away; whoever comes later finds none.
    pub fn end(self) {
        // The next collector removes it as well.
        let _ = remove_socket(self.dir.as_fd());
    }
}

fn remove_socket(dir: BorrowedFd<'_>) -> Result<(), Errno> {
    let stat = match rustix::fs::statat(dir, SOCKET, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        stat => stat?,
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(Errno::EXIST);
    }
    rustix::fs::unlinkat(dir, SOCKET, AtFlags::empty())
}

fn socket_dir(state_dir: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(state_dir, SOCKET_DIR, flags, Mode::empty())
}

/// A path that leads to what is open, wherever that lies by now.
fn through(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/thread-self/fd/{}", fd.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_locks_tells_who_holds_and_who_waits() {
        let table = "1: FLOCK  ADVISORY  READ 71 00:1f:42 0 EOF\n\
                     1: -> FLOCK  ADVISORY  WRITE 90 00:1f:42 0 EOF\n\
                     2: POSIX  ADVISORY  WRITE 71 fe:00:43 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 71 fe:00:44 0 EOF\n\
                     4: -> FLOCK  ADVISORY  READ 71 fe:00:44 0 EOF\n\
                     5: OFDLCK ADVISORY  READ -1 fe:00:42 0 0\n";
        let of = |file| Holders::of(table, file);
        assert_eq!(of("00:1f:42"), Holders { alone: false, waiting: true });
        assert_eq!(of("fe:00:42"), Holders::default(), "another file of that number");
        assert_eq!(of("fe:00:43"), Holders::default());
        assert_eq!(of("fe:00:44"), Holders { alone: true, waiting: false });
    }

    #[test]
    fn a_lock_that_is_held_together_is_waited_for_by_who_wants_it_alone() {
        let dir = tempfile::TempDir::new().expect("made");
        let state = crate::roots::open_dir(dir.path()).expect("opened");
        let (ours, theirs) = (GcLock::open(&state).expect("made"), GcLock::open(&state).expect("there"));
        ours.share().expect("locked");
        assert!(!theirs.try_take().expect("refused"));
        assert_eq!(ours.holders().expect("read"), Holders::default());
        std::thread::scope(|scope| {
            let collector = scope.spawn(|| rustix::fs::flock(&theirs.fd, FlockOperation::LockExclusive));
            while !ours.holders().expect("read").waiting {
                std::thread::yield_now();
            }
            ours.release().expect("released");
            collector.join().expect("ended").expect("locked");
        });
        assert_eq!(ours.holders().expect("read"), Holders { alone: true, waiting: false });
        assert!(!ours.try_share().expect("refused"));
        theirs.release().expect("released");
        ours.share().expect("had at once");
    }

    #[test]
    fn whoever_listens_in_a_collectors_place_takes_its_socket_and_nothing_else() {
        let dir = tempfile::TempDir::new().expect("made");
        let state = crate::roots::open_dir(dir.path()).expect("opened");
        for _ in 0..2 {
            // The first is left behind.
            let listening = listen(state.as_fd()).expect("listens");
            connect(state.as_fd()).expect("connects");
            drop(listening);
            assert!(connect(state.as_fd()).is_err());
        }
        listen(state.as_fd()).expect("listens").end();
        let socket = dir.path().join(SOCKET_DIR).join(SOCKET);
        assert!(!socket.exists());
        std::fs::write(&socket, "of somebody").expect("written");
        assert!(listen(state.as_fd()).is_err());
        assert_eq!(std::fs::read(&socket).expect("there"), b"of somebody");
        std::fs::remove_dir_all(dir.path().join(SOCKET_DIR)).expect("removed");
        std::os::unix::fs::symlink("/tmp", dir.path().join(SOCKET_DIR)).expect("linked");
        assert!(listen(state.as_fd()).is_err(), "no link is followed");
    }
}
