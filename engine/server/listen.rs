//! Owns sockets and time: accepting, the limits that belong to a connection, and the way down. Uses hyper directly
//! because a slow sender of headers and a reader who stops reading can only be caught here.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep, timeout};

use super::{AppState, ServerError, ServerOptions, Shared, guard};

/// Largest head of a request; larger ones are answered with 431. Also the size of a connection's buffers.
const MAX_HEADER_BYTES: usize = 64 * 1024;
/// Pause after the system refused a connection (out of file descriptors, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until Ctrl-C (or SIGTERM), on a runtime of its own. Prints `listening on http://ADDRESS` to stderr with the
/// port that was given out. Generations that still run at the end are cancelled.
///
/// # Errors
/// See [`ServerError`].
pub fn run(state: AppState) -> Result<(), ServerError> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(ServerError::Io)?;
    let result = runtime.block_on(async {
        let listener = bind(&state.options).await?;
        let address = listener.local_addr().map_err(ServerError::Io)?;
        eprintln!("listening on http://{address}");
        serve(state, listener, interrupted()).await
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn interrupted() {
    #[cfg(unix)]
    if let Ok(mut terminate) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
        return;
    }
    // Without signals there is no way down but the process's end.
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn bind(options: &ServerOptions) -> Result<TcpListener, ServerError> {
    let failed = |source| ServerError::Bind { address: format!("{}:{}", options.host, options.port), source };
    let addresses: Vec<_> =
        tokio::net::lookup_host((options.host.as_str(), options.port)).await.map_err(failed)?.collect();
    for address in &addresses {
        guard::check_exposure(options, address.ip())?;
    }
    TcpListener::bind(&*addresses).await.map_err(failed)
}

/// Serves until `shutdown` is done; then cancels what runs, answers it, and returns.
///
/// # Errors
/// [`ServerError::PublicWithoutKey`] and the like, before the first connection.
pub async fn serve(
    state: AppState,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServerError> {
    let address = listener.local_addr().map_err(ServerError::Io)?.ip();
    guard::check_exposure(&state.options, address)?;
    let room = Arc::new(Semaphore::new(state.options.max_connections));
    let grace = state.options.timeouts.shutdown;
    let shared = Shared::new(state, guard::is_loopback(address));
    let router = super::routes(Arc::clone(&shared));
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &room) => accepted,
            () = &mut shutdown => break,
        };
        while connections.try_join_next().is_some() {}
        connections.spawn(connection(accepted.0, accepted.1, router.clone(), Arc::clone(&shared)));
    }
    drop(listener);
    shared.stopping.send_replace(true);
    // What is left after the grace is dropped with the set, and its generations with it.
    let _ = timeout(grace, async { while connections.join_next().await.is_some() {} }).await;
    Ok(())
}

async fn accept(listener: &TcpListener, room: &Arc<Semaphore>) -> (TcpStream, OwnedSemaphorePermit) {
    let permit = Arc::clone(room).acquire_owned().await.expect("the semaphore is never closed");
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, permit),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, _room: OwnedSemaphorePermit, router: Router, shared: Arc<Shared>) {
    let timeouts = &shared.state.options.timeouts;
    // Tokens are small packets; waiting to fill larger ones would be visible.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot switch off delays");
    }
    let io = TokioIo::new(Patient { stream, patience: timeouts.write_stall, stalled: None });
    let http = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(timeouts.header)
        .max_buf_size(MAX_HEADER_BYTES)
        .serve_connection(io, TowerToHyperService::new(router));
    let mut http = pin!(http);
    let result = tokio::select! {
        result = &mut http => result,
        () = shared.stopped() => {
            http.as_mut().graceful_shutdown();
            http.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection ended early");
    }
}

/// A socket whose writes fail once nothing was taken for a while.
struct Patient {
    stream: TcpStream,
    patience: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Patient {
    fn watch<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let patience = self.patience;
        ready!(self.stalled.get_or_insert_with(|| Box::pin(sleep(patience))).as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.watch(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, pieces);
        self.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
