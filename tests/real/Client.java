import java.io.ByteArrayInputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.util.ArrayList;
import java.util.concurrent.CompletableFuture;

/** The JDK's client with its defaults, which offer h2c with a body: one line `STATUS LAST_CHARACTERS` a request. */
public class Client {
    static final HttpClient CLIENT = HttpClient.newHttpClient();

    static HttpRequest.Builder to(String url, BodyPublisher body) {
        return HttpRequest.newBuilder(URI.create(url)).header("Content-Type", "application/json").POST(body);
    }

    static void show(HttpResponse<String> reply) {
        String text = reply.body().strip();
        System.out.println(reply.statusCode() + " " + text.substring(Math.max(0, text.length() - 12)));
    }

    public static void main(String[] arguments) throws Exception {
        String url = arguments[0], body = arguments[1];
        var whole = HttpResponse.BodyHandlers.ofString();
        for (int i = 0; i < 3; i++) {
            show(CLIENT.send(to(url, BodyPublishers.ofString(body)).build(), whole));
        }
        BodyPublisher chunked = BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(body.getBytes()));
        show(CLIENT.send(to(url, chunked).build(), whole));
        show(CLIENT.send(to(url, chunked).expectContinue(true).build(), whole));
        show(CLIENT.send(to(url, BodyPublishers.ofString(body + " ".repeat(1000000))).build(), whole));
        var parallel = new ArrayList<CompletableFuture<HttpResponse<String>>>();
        for (int i = 0; i < 20; i++) {
            parallel.add(CLIENT.sendAsync(to(url, BodyPublishers.ofString(body)).build(), whole));
        }
        parallel.forEach(reply -> show(reply.join()));
    }
}
