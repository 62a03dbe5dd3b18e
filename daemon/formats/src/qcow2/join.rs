//! Several requests of one task at the same time.

use block::IoResult;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

/// Runs all to their ends; the result is the first error among them. For a few futures: each wake-up polls all.
pub async fn join_all<F: Future<Output = IoResult>>(futures: Vec<F>) -> IoResult {
    let mut running: Vec<Pin<Box<F>>> = futures.into_iter().map(Box::pin).collect();
    let mut result = Ok(());
    poll_fn(|cx| {
        running.retain_mut(|future| match future.as_mut().poll(cx) {
            Poll::Pending => true,
            Poll::Ready(done) => {
                if result.is_ok() {
                    result = done;
                }
                false
            }
        });
        if running.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    result
}
