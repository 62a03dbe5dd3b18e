//! What a service manager hears: that the daemon serves, that it is alive, that it ends. [sd_notify(3)]
//!
//! Where no manager listens nothing is said. That one does not take what it is told is its own affair.

use sd_notify::NotifyState;

/// Tells the manager that everything is set up, and from now on that the event loop of the main thread turns, as often as
/// the manager wants to hear it. Must be called from a local task.
pub fn ready() {
    // The main process is another one than was started if it went to the background.
    let _ = sd_notify::notify(&[NotifyState::MainPid(std::process::id()), NotifyState::Ready]);
    // Twice in the time after which the manager gives the daemon up.
    let period = sd_notify::watchdog_enabled().map(|limit| limit / 2);
    let Some(period) = period.filter(|period| !period.is_zero()) else { return };
    tokio::task::spawn_local(async move {
        let mut ticks = tokio::time::interval(period);
        loop {
            ticks.tick().await;
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
        }
    });
}

/// Tells the manager that the daemon closes what it has.
pub fn stopping() {
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
}
