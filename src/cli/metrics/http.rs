//! One client of `layered-stores-metrics.socket`, which systemd has made standard input.

use std::{
    convert::Infallible,
    io,
    os::{fd::AsFd as _, unix::net::UnixStream},
    time::Duration,
};

use anyhow::{Context as _, Result};
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::prometheus_text;

use super::{Seen, figures};
use crate::cli::output::complain;

/// The longest head of a request, in bytes; hyper takes no less. A body is not read.
const LONGEST_HEAD: usize = 8192;

/// How long a client may take to send its request, and for all of it.
const HEAD_PATIENCE: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(15);

/// Answers one request.
///
/// # Errors
/// When standard input is no socket.
pub(in crate::cli) async fn answer() -> Result<()> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    socket.peer_addr().context("standard input is no connection; layered-stores-metrics.socket runs this")?;
    socket.set_nonblocking(true)?;
    let socket = TokioIo::new(tokio::net::UnixStream::from_std(socket)?);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .max_buf_size(LONGEST_HEAD)
        .keep_alive(false)
        .serve_connection(socket, service_fn(respond));
    // A client that goes away, takes too long or does not speak HTTP is nothing to talk about.
    let _ = tokio::time::timeout(PATIENCE, connection).await;
    Ok(())
}

async fn respond(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (method, path) = (request.method(), request.uri().path());
    if path != "/metrics" {
        return Ok(plain(StatusCode::NOT_FOUND, "there is only /metrics\n"));
    }
    if method != Method::GET && method != Method::HEAD {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "there is only GET\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return Ok(response);
    }
    let text = async { anyhow::Ok(figures::text(Seen::gather().await?)?) }.await;
    Ok(match text {
        Ok(text) => with_type(StatusCode::OK, text, prometheus_text::CONTENT_TYPE),
        Err(error) => {
            complain(&format!("{error:#}"));
            plain(StatusCode::SERVICE_UNAVAILABLE, &format!("{error:#}\n"))
        }
    })
}

fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    with_type(status, text.to_owned(), "text/plain; charset=utf-8")
}

fn with_type(status: StatusCode, text: String, content_type: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
